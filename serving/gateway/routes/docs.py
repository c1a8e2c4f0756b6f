"""The interactive documentation: Swagger UI, served from here, so that a private rig asks nobody for it."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

# Swagger UI writes style attributes, and draws with data URLs; all else comes from this server.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"content-security-policy": _POLICY}
# Addresses are relative: a proxy may serve all of this below a path of its own.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rigserve: API</title>
<link rel="icon" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Without a validatorUrl, the page would show the document to a server of Swagger's.
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
});
"""
_ASSETS = {
    "favicon.png": "image/png",
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
}
_CACHED = {"cache-control": "max-age=3600"}


def routes() -> APIRouter:
    """The page and what it is made of."""
    router = APIRouter(prefix="/docs", include_in_schema=False)
    folder = files("fastapi_offline") / "static"
    assets = {name: (folder / name).read_bytes() for name in _ASSETS}

    @router.get("")
    async def page() -> Response:
        return Response(_PAGE, headers=_HEADERS, media_type="text/html")

    @router.get("/start.js")
    async def start() -> Response:
        return Response(_START, media_type="text/javascript")

    def serve(name: str) -> None:
        @router.get(f"/{name}")
        async def asset() -> Response:
            return Response(assets[name], headers=_CACHED, media_type=_ASSETS[name])

    for each in _ASSETS:
        serve(each)
    return router
