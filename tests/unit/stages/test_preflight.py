"""What is refused before any work."""

from pathlib import Path

import onnx
import onnx_models as nets
import pytest

from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ConfigError
from onnxshrink.stages.preflight import preflight


@pytest.mark.parametrize("batch", [1, 8])
def test_a_batch_that_the_model_cannot_take_is_refused(tmp_path: Path, batch: int) -> None:
    """A target's batch must be that of a model that takes no other; one that is not given may be anything."""
    model = nets.cnn()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "model.onnx")
    raw = {"model": {"onnx": str(tmp_path / "model.onnx")}, "stages": [{"kind": "optimize"}]}
    for targets in ([{}], [{"batch": 4}]):
        preflight(RunConfig.model_validate(raw | {"targets": targets}))
    with pytest.raises(ConfigError, match=rf"(?s)fixed to 4.*batch: {batch}.*batch: 4"):
        preflight(RunConfig.model_validate(raw | {"targets": [{"batch": batch}]}))
