"""Run an exported model: python run_onnx.py IMAGE "SENTENCE" MASK.png (needs onnxruntime, tokenizers and pillow)."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

if len(sys.argv) != 4:
    sys.exit(__doc__)
here, (image_file, sentence, mask_file) = Path(__file__).parent, sys.argv[1:]
settings = json.loads((here / "export.json").read_text())
size, length, mean, std = (settings[name] for name in ("size", "max_tokens", "mean", "std"))
image = Image.open(image_file).convert("RGB")
if settings["resize"] == "square":
    box, fitted = (0, 0, size, size), image.resize((size, size), Image.Resampling.BILINEAR)
else:  # letterbox: keep the aspect ratio, pad with the mean colour
    scale = size / max(image.size)
    inner = [max(1, round(n * scale)) for n in image.size]
    left, top = ((size - n) // 2 for n in inner)
    box, fitted = (left, top, left + inner[0], top + inner[1]), Image.new("RGB", (size, size), tuple(map(round, mean)))
    fitted.paste(image.resize(inner, Image.Resampling.BICUBIC, reducing_gap=None), box)
pixels = ((np.asarray(fitted, np.float32) - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None]
ids = Tokenizer.from_file(str(here / "tokenizer.json")).encode(sentence).ids
if len(ids) > length:
    ids = ids[: length - 1] + ids[-1:] if settings["keeps_end_token"] else ids[:length]
tokens = np.array([ids + [0] * (length - len(ids))], np.int64)
inputs = {"image": pixels, "input_ids": tokens, "text_mask": np.arange(length)[None] < len(ids)}
session = onnxruntime.InferenceSession(here / "model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {entry.name: inputs[entry.name] for entry in session.get_inputs()})[0][0]
margin = Image.fromarray(logits[1] - logits[0] if len(logits) == 2 else logits[0])
margin = margin.resize((size, size), Image.Resampling.BILINEAR).crop(box).resize(image.size, Image.Resampling.BILINEAR)
mask = 1 / (1 + np.exp(-np.asarray(margin))) > settings["threshold"]
Image.fromarray(mask).convert("L").save(mask_file)
print(f"{100 * mask.mean():.1f} % of the image -> {mask_file}")
