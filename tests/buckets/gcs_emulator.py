"""gcp-storage-emulator with its faults fixed: ``python gcs_emulator.py PORT``.

It fails on objects without a byte, answers ranges behind the end of an object with 206 where Google
Cloud Storage says 416, lists past startOffset and endOffset, and knows neither the header
x-goog-generation nor the conditions on it, ifGenerationMatch and ifGenerationNotMatch.
"""

from __future__ import annotations

import re
import sys
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.handlers import objects

_download, _list, _media_upload = objects.download, objects.ls, objects._media_upload


def _generation(request: Any, storage: Any, name: str) -> str:
    """Of the object as it is there; "0", as Google Cloud Storage says, of one that is not."""
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except objects.NotFound:
        return "0"


def _upload(request: Any, response: Any, storage: Any) -> None:
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != _generation(request, storage, request.query["name"][0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    if request.data is None:
        request._data = b""
    _media_upload(request, response, storage)


def _download_range(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
    name = request.params["object_id"]
    generation = _generation(request, storage, name)
    start = re.match(r"\s*bytes=(\d+)-", request.get_header("range", None) or "")
    if generation != "0":
        response["x-goog-generation"] = generation
        if generation in request.query.get("ifGenerationNotMatch", []):
            response.status = HTTPStatus.NOT_MODIFIED
            return
        size = len(storage.get_file(request.params["bucket_name"], name))
        if start and int(start[1]) >= size:
            response.status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            return
    _download(request, response, storage, *args, **kwargs)


def _list_within(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
    answer = response.json
    first, end = (request.query.get(name, [None])[0] for name in ("startOffset", "endOffset"))

    def within(found: dict[str, Any]) -> None:
        items = [o for o in found["items"] if (first or "") <= o["name"]]
        answer({**found, "items": [o for o in items if end is None or o["name"] < end]})

    response.json = within
    _list(request, response, storage, *args, **kwargs)


def run(port: str) -> int:
    """Serves one empty bucket, named "bucket", until it is killed."""
    objects._media_upload, objects.download, objects.ls = _upload, _download_range, _list_within
    from gcp_storage_emulator import server  # takes its table of handlers when it is imported
    from gcp_storage_emulator.__main__ import main

    server.server.HTTPServer.request_queue_size = 128  # tensorstore opens many at once
    options = ["--quiet", "--in-memory", "--host", "127.0.0.1", "--default-bucket", "bucket"]
    return main(["start", *options, "--port", port])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
