"""Text, images or tokens in, batches of model inputs out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from .models import Batch, is_causal_lm, is_text_model, tokens_per_sample
from .self_text import SELF, self_windows

T = TypeVar("T")

CHARACTERS_PER_TOKEN = 8
"""More than a token of text has on average in any language; so much of a data set is read."""


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


def read_texts(
    data: Any, text_column: str | None = None, max_characters: int | None = None, row_characters: int | None = None
) -> list[str]:
    """
    Return the documents of a text source.

    Args:
        data: the path of a text file (one document), a list of strings, or a `datasets.Dataset` (or any iterable of
            dicts) with a column of strings.
        text_column (`str`, *optional*): of a dataset; the first column of strings if left out.
        max_characters (`int`, *optional*): of a dataset, read no more rows than give that many (see [`spread_rows`]).
        row_characters (`int`, *optional*): of a row, no more than so many count.

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

        def counted(row: dict[str, Any]) -> int:
            return len((row[column] or "")[:row_characters])

        rows = data if max_characters is None else spread_rows(data, counted, max_characters)
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
    return ids[: total * window].view(total, window)[spread(range(total), total if count is None else count)]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after every input."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def calibration_batches(
    model: PreTrainedModel,
    data: Any,
    processor: Any,
    window: int,
    max_tokens: int,
    batch_size: int,
    seed: int,
    text_column: str | None = None,
    lines: bool = False,
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
        seed (`int`): for `"self"`, and of the order of lines.
        text_column (`str`, *optional*): of a data set.
        lines (`bool`, defaults to `False`): see [`line_batches`]; a batch holds as many tokens as with windows.

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
    if lines:
        return line_batches(
            model, data, processor, window, batch_size * window, max_tokens=max_tokens, column=text_column, seed=seed
        )
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
        raise ValueError(_NO_TOKENIZER)
    windows = token_windows(texts, processor, window, count, special_tokens=not is_causal_lm(model))
    return split(windows, batch_size, model)


_NO_TOKENIZER = "text data needs a tokenizer: polarize(model, data, processor=tokenizer)"


def line_batches(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any,
    window: int,
    batch_tokens: int,
    *,
    count: int | None = None,
    max_tokens: int | None = None,
    column: str | None = None,
    seed: int = 0,
) -> list[Batch]:
    """
    Make each line of a text, or of the rows of a data set, an input of its own; a batch holds lines of one length.

    Args:
        model (`PreTrainedModel`): an encoder.
        data: what [`read_texts`] reads.
        tokenizer: of the model; it adds its special tokens.
        window (`int`): tokens to which longer lines are cut.
        batch_tokens (`int`): tokens per batch; at least one line.
        count (`int`, *optional*): lines at most, spread evenly.
        max_tokens (`int`, *optional*): tokens of all lines together, at most; each line once.
        column (`str`, *optional*): of a data set.
        seed (`int`): of the order of the batches.

    Returns:
        `list[dict[str, torch.Tensor]]`, unpadded: `input_ids` and an `attention_mask` of ones, both `(lines, length)`.

    Raises:
        ValueError: If the model is no encoder, which writes no text either, or `max_tokens` holds no line.
    """
    if (
        not is_text_model(model)
        or is_causal_lm(model)
        or model.get_output_embeddings() is not None
        or getattr(model.config, "is_encoder_decoder", False)
    ):
        raise ValueError(
            f"lines are inputs of encoders that embed or classify sentences, and {type(model).__name__} is none: "
            "leave lines out, or take model_class: AutoModel"
        )
    if tokenizer is None:
        raise ValueError(_NO_TOKENIZER)
    if isinstance(data, str) and data == SELF:
        raise ValueError(f'lines come from a text or a data set; {type(model).__name__} can\'t write them ("{SELF}")')
    longest = min(window, tokenizer.model_max_length)
    limit = None if max_tokens is None else CHARACTERS_PER_TOKEN * max_tokens
    texts = read_texts(data, column, limit, CHARACTERS_PER_TOKEN * longest)
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if count is not None:
        lines = spread(lines, count)
    if max_tokens is not None:
        lines = list(dict.fromkeys(lines))  # what is held back must not be among the others
    rows = [row for row in tokenizer(lines, truncation=True, max_length=longest)["input_ids"] if row]
    total = sum(map(len, rows))
    if max_tokens is not None and total > max_tokens:
        rows = spread(rows, len(rows) * max_tokens // total)
        total = sum(map(len, rows))
        while total > max_tokens:
            total -= len(rows.pop())
    if not rows:
        raise ValueError(f"max_tokens={max_tokens} holds no line of the data")
    rows.sort(key=len)
    batches = []
    for length, group in itertools.groupby(rows, key=len):
        for ids in torch.tensor(list(group)).split(max(1, batch_tokens // length)):
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    random.Random(seed).shuffle(batches)
    return batches


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return so many items, or all if there are fewer, spread evenly."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


def lines_per_window(lengths: Sequence[int], window: int) -> int:
    """Return how many lines of such lengths hold as many tokens as a window, on average."""
    return max(1, round(window * len(lengths) / sum(lengths)))


def lengths(batches: Sequence[Batch]) -> list[int]:
    """Return the number of tokens of each sample."""
    return [len(row) for batch in batches for row in batch["input_ids"]]


def _values(row: Any) -> list[Any]:
    return list(row.values()) if isinstance(row, dict) else [row]


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
