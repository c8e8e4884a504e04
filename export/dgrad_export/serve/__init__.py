"""Serving exported models over HTTP: Starlette and uvicorn."""
