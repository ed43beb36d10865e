"""Weight sync by messages: each bucket is pickled once and posted to every server."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterable

from torch import Tensor

from megatron_bupo.rollout.sglang.weight_sync.calls import Attempt, Bucket, SyncMethod, ask, buckets
from megatron_bupo.weights.disk import own_bytes


class TensorMessages(SyncMethod):
    """POST /update_weights_from_tensor. Works with any server; a message has a third more bytes than its tensors."""

    name = "tensor"

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes

    def send(self, attempt: Attempt, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # A message holds one copy for every tensor-parallel rank of the server.
        copies = max(worker.info.tp_size for worker in attempt.workers)
        for bucket in buckets(tensors, max(1, self._bucket_bytes // copies)):
            self._post(attempt, bucket)

    def _post(self, attempt: Attempt, bucket: Bucket) -> None:
        entry = serialize(bucket.tensors)
        fixed = {"load_format": None, "flush_cache": False, "weight_version": attempt.label(bucket)}
        # Encoded once for all servers of one tensor-parallel size: a message is large.
        bodies = {
            size: json.dumps(fixed | {"serialized_named_tensors": [entry] * size}).encode()
            for size in {worker.info.tp_size for worker in attempt.workers}
        }
        attempt.on_all(
            str(bucket),
            lambda worker: ask(worker, "/update_weights_from_tensor", bodies[worker.info.tp_size], attempt.timeout_s),
        )


def serialize(tensors: list[tuple[str, Tensor]]) -> str:
    """base64 of the pickled (name, tensor) list; every tensor is on the CPU and its storage has no other bytes.

    Torch's serializer for other processes sends handles instead, which ended the server when it was no child process.
    """
    return base64.b64encode(pickle.dumps([(name, own_bytes(tensor)) for name, tensor in tensors])).decode("ascii")
