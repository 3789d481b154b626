"""Text, images or tokens in, batches of model inputs out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

SELF = "self"
"""Name of the calibration data that the original model writes itself."""

LIKELIEST = 4
"""Tokens after the first that the model does not sample when it writes its own calibration text."""

CHARACTERS_PER_TOKEN = 8
"""More than a token of text has on average in any language; so much of a data set is read."""

Batch = dict[str, torch.Tensor]


def to_model(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """Move a batch to the device of a model, and images and the like to its dtype."""
    return {
        key: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for key, value in batch.items()
    }


def bfloat16_is_fast(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def mixed_precision(model: PreTrainedModel) -> torch.autocast:
    """Multiply in bfloat16 inside this context, if the model is in float32 and its device is faster that way."""
    device = torch.device(model.device)
    return torch.autocast(
        device.type, torch.bfloat16, enabled=model.dtype == torch.float32 and bfloat16_is_fast(device)
    )


def bfloat16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with parameters in bfloat16 where that is faster than the float32 of the model; else the model."""
    if model.dtype != torch.float32 or not bfloat16_is_fast(torch.device(model.device)):
        return model
    cast = {id(p): torch.nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, cast)


def is_text_model(model: PreTrainedModel) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Tell whether a model predicts the next token of its input: it has an output embedding and looks only back."""
    return (
        is_text_model(model)
        and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        and model.get_output_embeddings() is not None
    )


def spread_rows(
    data: Any, size: Callable[[dict[str, Any]], int], needed: int, slabs: int = 32
) -> list[dict[str, Any]]:
    """
    Return rows of a data set until their sizes add up to what is needed.

    Of a data set of known length they come from `slabs` runs of neighbouring rows, spread evenly, so that a long text
    that spans rows stays together; of a stream they are the first ones.
    """
    known = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    starts = [i * len(data) // slabs for i in range(slabs)] if known else [0]
    ends = [*starts[1:], len(data)] if known else [None]
    rows: list[dict[str, Any]] = []
    for start, end in zip(starts, ends, strict=True):
        taken = 0
        for row in (data[i] for i in range(start, end)) if end is not None else data:
            if taken * len(starts) >= needed:
                break
            rows.append(row)
            taken += size(row)
    return rows


def check_split(data: Any) -> None:
    """Raise if data is a dictionary of data sets and not one of them."""
    if hasattr(data, "keys") and not isinstance(getattr(data, "column_names", None), list):
        raise ValueError(f"data is a dictionary of {sorted(data)}; choose one of them: data[{sorted(data)[0]!r}]")


def read_texts(data: Any, text_column: str | None = None, max_characters: int | None = None) -> list[str]:
    """
    Return the documents of a text source.

    Args:
        data: the path of a text file (one document), a list of strings, or a `datasets.Dataset` (or any iterable of
            dicts) with a column of strings.
        text_column (`str`, *optional*): of a dataset; the first column of strings if left out.
        max_characters (`int`, *optional*): of a dataset, read no more rows than give that many (see [`spread_rows`]).

    Raises:
        FileNotFoundError: If `data` is a path and there is no such file.
        ValueError: If there is no text in it.
    """
    check_split(data)
    if isinstance(data, (str, Path)):
        path = Path(data)
        if len(str(data)) > 4096 or not path.is_file():
            raise FileNotFoundError(
                f'no text file "{str(data)[:80]}". Data is the path of a text file, "{SELF}" (text that the original '
                "model writes itself), a list of strings, or a datasets.Dataset."
            )
        try:
            texts = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError:
            raise ValueError(f'"{data}" is not a text file in UTF-8') from None
    elif isinstance(data, Sequence) and all(isinstance(item, str) for item in data):
        texts = list(data)
    elif isinstance(data, Iterable):
        iterator = iter(data)
        first = next(iterator, None)
        if iterator is data:  # it gives its rows once
            data = itertools.chain([first], iterator)
        if not isinstance(first, dict):
            raise ValueError(f"can't read text from a {type(data).__name__} of {type(first).__name__}")
        strings = [key for key, value in first.items() if isinstance(value, str)]
        column = text_column or next(iter(strings), "")
        if column not in strings:
            raise ValueError(f"no text column {text_column or ''} in the data set; it has {sorted(first)}")
        rows = (
            data if max_characters is None else spread_rows(data, lambda row: len(row[column] or ""), max_characters)
        )
        texts = [row[column] or "" for row in rows]
    else:
        raise ValueError(f"can't read text from {type(data).__name__}")
    if not any(text.strip() for text in texts):
        raise ValueError("the data holds no text")
    return texts


def token_windows(
    texts: Sequence[str],
    tokenizer: Any,
    window: int,
    count: int | None = None,
    special_tokens: bool = False,
) -> torch.Tensor:
    """
    Tokenize the whole text once and cut it into windows of equal length that don't overlap.

    Args:
        texts (`Sequence[str]`): documents, joined by a blank line.
        tokenizer: of the model.
        window (`int`): tokens per window.
        count (`int`, *optional*): take that many windows, spread evenly over the text; all of them if left out or if
            there are fewer.
        special_tokens (`bool`, defaults to `False`): put the tokens that the tokenizer adds to every input (an
            encoder's `[CLS]` and `[SEP]`, say) around each window, inside its length.

    Returns:
        `torch.Tensor` of shape `(count, window)`, int64.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    before, after = _special_tokens(tokenizer) if special_tokens else ([], [])
    body = cut(torch.tensor(ids, dtype=torch.int64), window - len(before) - len(after), count)
    edges = [torch.tensor(part, dtype=torch.int64).expand(len(body), -1) for part in (before, after)]
    return torch.cat([edges[0], body, edges[1]], dim=1)


def cut(ids: torch.Tensor, window: int, count: int | None) -> torch.Tensor:
    """Cut tokens `(n,)` into `(count, window)` that don't overlap, spread evenly; without a count, into all."""
    total = len(ids) // window if window > 0 else 0
    if total < 1:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}: give more text")
    chosen = range(total) if count is None or count >= total else [i * total // count for i in range(count)]
    return ids[: total * window].view(total, window)[list(chosen)]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after every input."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


_CANT_WRITE = (
    f'{{}} can\'t write its own calibration text (data="{SELF}"): {{}}; '
    "give a text file, a list of strings or a data set"
)


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Draw a class of softmax(logits) for each row, `(n, 1)`, by inverting its distribution.

    torch.multinomial draws a number for every class: a millisecond per row of a vocabulary on a CPU.
    """
    cumulated = logits.float().softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, drawn).clamp(max=logits.shape[-1] - 1)


class _Sample(LogitsProcessor):
    """Leave only one next token possible: the first `after` times the likeliest, then one that is drawn."""

    def __init__(self, generator: torch.Generator, after: int) -> None:
        self.generator, self.after = generator, after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] <= self.after:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(-1, draw(scores, self.generator), 0.0)


@torch.no_grad()
def self_windows(model: PreTrainedModel, window: int, count: int, seed: int, batch_size: int = 128) -> torch.Tensor:
    """
    Let a causal language model write its own calibration text.

    Each window starts with a random word of the vocabulary and its `LIKELIEST` likeliest successors, which find a
    topic for it, and goes on at temperature 1 (LLM-QAT, arXiv 2305.17888, section 2.1). What follows the end of a text
    is the next one, as in pretraining. A chat model that starts from its first token writes mostly fragments.

    Args:
        model (`PreTrainedModel`): the original model.
        window (`int`): tokens per window.
        count (`int`): number of windows.
        seed (`int`): of the sampling; torch's own random state is left as it was.
        batch_size (`int`, defaults to 128): windows written side by side, at most.

    Returns:
        `torch.Tensor` of shape `(count, window)`, int64.
    """
    if not model.can_generate() or not is_causal_lm(model):
        raise ValueError(_CANT_WRITE.format(type(model).__name__, "it is no causal language model"))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(model.config.get_text_config().vocab_size, (count, 1), generator=generator)
    parts: list[torch.Tensor] = []
    writer = bfloat16_copy(model)
    own = writer.generation_config
    with logging.tqdm(total=count * (window - 1), desc="writing calibration text", unit="token") as bar:

        def show(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            bar.update(len(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # never a reason to stop

        # generate fills gaps from the model's own configuration
        writer.generation_config = GenerationConfig(do_sample=False, max_new_tokens=window - 1, pad_token_id=0)
        try:
            for ids in starts.to(model.device).chunk(-(-count // batch_size)) if window > 1 else ():
                # in one call: a prompt of several tokens makes torch copy the output embedding for each row on a CPU
                written = writer.generate(
                    ids, attention_mask=torch.ones_like(ids), stopping_criteria=[show],
                    logits_processor=[_Sample(generator, LIKELIEST)],
                )  # fmt: skip
                parts.append(written.cpu())
        finally:
            writer.generation_config = own
    return torch.cat(parts) if parts else starts


def calibration_batches(
    model: PreTrainedModel,
    data: Any,
    processor: Any,
    window: int,
    max_tokens: int,
    batch_size: int,
    seed: int,
    text_column: str | None = None,
) -> list[Batch]:
    """
    Turn calibration data into batches of model inputs, without padding.

    Args:
        model (`PreTrainedModel`): the original model; it says which kind of input it takes, and writes `"self"`.
        data: what [`read_texts`] reads, `"self"`, a data set of tokens (column `input_ids`), of `pixel_values`, or of
            images, or a list of batches (dicts of tensors).
        processor: the tokenizer, or the image processor.
        window (`int`): tokens per window.
        max_tokens (`int`): at most that many tokens, in whole windows spread evenly over the text, or as the patches
            of whole images; at least one. A data set is read no further than that takes.
        batch_size (`int`): windows per batch.
        seed (`int`): for `"self"`.
        text_column (`str`, *optional*): of a data set.

    Returns:
        `list[dict[str, torch.Tensor]]` on the CPU.
    """
    if isinstance(data, list) and data and all(isinstance(value, torch.Tensor) for value in _values(data[0])):
        if any(not batch[key].all() for batch in data for key in batch if key.endswith("attention_mask")):
            raise ValueError(
                "a batch has padding (zeros in its attention_mask), which would count as input; leave it out"
            )
        return data
    check_split(data)
    count = max(1, max_tokens // tokens_per_sample(model, window))
    if not is_text_model(model):
        return _image_batches(data, processor, count, batch_size)
    if isinstance(data, str) and data == SELF:
        return split(self_windows(model, window, count, seed), batch_size, model)
    if "input_ids" in (getattr(data, "column_names", None) or []):
        rows = spread_rows(data, lambda row: len(row["input_ids"]), 2 * max_tokens)
        masks = [row.get("attention_mask", [1] * len(row["input_ids"])) for row in rows]
        ids = [
            token
            for row, mask in zip(rows, masks, strict=True)
            for token in itertools.compress(row["input_ids"], mask)
        ]
        return split(cut(torch.tensor(ids, dtype=torch.int64), window, count), batch_size, model)
    texts = read_texts(data, text_column, max_characters=CHARACTERS_PER_TOKEN * max_tokens)
    if processor is None:
        raise ValueError("text data needs a tokenizer: polarize(model, data, processor=tokenizer)")
    windows = token_windows(texts, processor, window, count, special_tokens=not is_causal_lm(model))
    return split(windows, batch_size, model)


def line_batches(data: Any, tokenizer: Any, count: int, batch_size: int, column: str | None = None) -> list[Batch]:
    """
    Turn each line of a text, or row of a data set, into one input of its own; the lines of a batch are padded.

    Args:
        data: what [`read_texts`] reads.
        tokenizer: of the model.
        count (`int`): lines at most, spread evenly.
        batch_size (`int`): lines per batch; shorter ones come first, so that there is little padding.
        column (`str`, *optional*): of a data set.

    Returns:
        `list[dict[str, torch.Tensor]]` with `attention_mask`.
    """
    lines = [line for text in read_texts(data, column) for line in text.splitlines() if line.strip()]
    if len(lines) > count:
        lines = [lines[i * len(lines) // count] for i in range(count)]
    lines.sort(key=len)
    return [
        dict(tokenizer(lines[start : start + batch_size], padding=True, truncation=True, return_tensors="pt"))
        for start in range(0, len(lines), batch_size)
    ]


def _values(row: Any) -> list[Any]:
    return list(row.values()) if isinstance(row, dict) else [row]


def tokens_per_sample(model: PreTrainedModel, window: int) -> int:
    """Return the tokens of one sample: of a text window, or the patches of an image."""
    size, patch = getattr(model.config, "image_size", None), getattr(model.config, "patch_size", None)
    if is_text_model(model):
        return window
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else 197


def split(windows: torch.Tensor, batch_size: int, model: PreTrainedModel) -> list[Batch]:
    """Cut windows `(n, window)` into batches; an encoder-decoder reads and writes the same text."""
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    return [{"input_ids": part, **({"decoder_input_ids": part} if both else {})} for part in windows.split(batch_size)]


def _image_batches(data: Any, processor: Any, count: int, batch_size: int) -> list[Batch]:
    columns = getattr(data, "column_names", None) or []
    column = next((name for name in ("pixel_values", "image", "img") if name in columns), None)
    if column is None or (column != "pixel_values" and processor is None):
        raise ValueError(
            "a vision model is calibrated on a data set with a column pixel_values, or image with an image processor; "
            f"got {type(data).__name__} with columns {list(columns) or 'none'}"
        )
    values = [row[column] for row in spread_rows(data, lambda row: 1, count, slabs=count)]
    if not values:
        raise ValueError("the data set holds no images")
    if column == "pixel_values":
        pixels = torch.stack([torch.as_tensor(value) for value in values]).float()
    else:
        pixels = processor(images=[image.convert("RGB") for image in values], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": part} for part in pixels.split(batch_size)]
