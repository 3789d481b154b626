"""Load checkpoints where hf_polarize can't be imported: AUTO_CLASS SOURCE INPUTS OUTPUT, repeated."""

import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_polarize":
            raise ImportError("hf_polarize is blocked in this process")


sys.meta_path.insert(0, Blocked())

import torch  # noqa: E402
import transformers  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

arguments = sys.argv[1:]
for auto_class, source, inputs, result in zip(*[iter(arguments)] * 4, strict=True):
    model = getattr(transformers, auto_class).from_pretrained(source)
    assert any(isinstance(module, LoraLayer) for module in model.modules()), "no adapter was loaded"
    with torch.no_grad():
        outputs = model(**torch.load(inputs))
    torch.save(outputs.logits if "logits" in outputs else outputs.last_hidden_state, result)
assert not any(name.partition(".")[0] == "hf_polarize" for name in sys.modules)
