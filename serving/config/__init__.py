"""The YAML file that says what to serve: its schema, and a loader whose errors name the line and the mend."""

from serving.config.load import (
    ConfigError,
    Problem,
    config_json_schema,
    load_config,
    located,
)
from serving.config.schema import (
    AdapterConfig,
    Config,
    CostConfig,
    FiltersConfig,
    LlamaCppModel,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    PowerConfig,
    ServerConfig,
    StorageConfig,
    TracingConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "ConfigError",
    "CostConfig",
    "FiltersConfig",
    "LlamaCppModel",
    "LoggingConfig",
    "MemoryConfig",
    "ModelConfig",
    "PowerConfig",
    "Problem",
    "ServerConfig",
    "StorageConfig",
    "TracingConfig",
    "config_json_schema",
    "load_config",
    "located",
]
