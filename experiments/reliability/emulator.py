"""A Cloud Storage emulator that, unlike `gcp-storage-emulator` alone, checks generations."""

import contextlib
import socket
from http import HTTPStatus


def _checked(handler):
    from gcp_storage_emulator.exceptions import NotFound

    def handle(request, response, storage, *args, **kwargs):
        if wanted := request.query.get("ifGenerationMatch"):
            name = request.params.get("object_id") or request.query.get("name", [None])[0]
            name = name or request.data["meta"]["name"]
            try:
                found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except NotFound:
                found = "0"
            if wanted != [found]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        result = handler(request, response, storage, *args, **kwargs)
        if request.method == "GET" and request.params.get("object_id"):
            with contextlib.suppress(NotFound):
                found = storage.get_file_obj(
                    request.params["bucket_name"], request.params["object_id"]
                )
                # Tensorstore takes the generation of what it reads from here.
                response["x-goog-generation"] = found["generation"]
        return result

    return handle


@contextlib.contextmanager
def cloud_storage(bucket):
    """Serves an empty bucket; yields the URL for STORAGE_EMULATOR_HOST."""
    from gcp_storage_emulator import server

    routes = server.HANDLERS
    server.HANDLERS = tuple(
        (pattern, {method: _checked(handler) for method, handler in handlers.items()})
        for pattern, handlers in routes
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        with server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket):
            yield f"http://127.0.0.1:{port}"
    finally:
        server.HANDLERS = routes
