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
    AnyModel,
    Config,
    CostConfig,
    FiltersConfig,
    LlamaCppModel,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    PowerConfig,
    RemoteModel,
    RouteConfig,
    ServerConfig,
    StorageConfig,
    UsdPerMillion,
)

__all__ = [
    "AdapterConfig",
    "AnyModel",
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
    "RemoteModel",
    "RouteConfig",
    "ServerConfig",
    "StorageConfig",
    "UsdPerMillion",
    "config_json_schema",
    "load_config",
    "located",
]
