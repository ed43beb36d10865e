"""What a rollout engine keeps of a model: nothing, once the model was released."""

import gc
import weakref
from typing import Any

import pytest

from megatron_bupo.model.scoring import ModelForEngine


class Model:
    def hf_tensors(self, since: str | None = None) -> Any:
        return iter(())


def test_a_released_model_is_freed_while_an_engine_holds_on() -> None:
    model: Any = Model()
    alive = weakref.ref(model)
    kept_by_an_engine = ModelForEngine(model, max_tokens=8)
    del model
    assert list(kept_by_an_engine.hf_tensors()) == []
    assert alive() is not None
    kept_by_an_engine.release()
    gc.collect()
    assert alive() is None
    with pytest.raises(AssertionError, match="released"):
        kept_by_an_engine.hf_tensors()
