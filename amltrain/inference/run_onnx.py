"""Run an exported model: python run_onnx.py IMAGE "SENTENCE" MASK.png (needs onnxruntime, tokenizers and pillow)."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def taps(position, count, *, cubic, clamp):
    """[outputs, count]: how much of each of `count` pixels an output at `position` reads. clamp: repeat the border."""
    first = np.floor(position).astype(int)[:, None]
    steps = np.arange(-1, 3) if cubic else np.arange(2)
    d = np.abs(position[:, None] - first - steps)
    kernel = np.where(d <= 1, (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3)
    index = first + steps
    weight = (kernel if cubic else 1 - d) * (clamp | ((index >= 0) & (index < count)))
    matrix = np.zeros((len(position), count))
    np.add.at(matrix, (np.arange(len(position))[:, None], index.clip(0, count - 1)), weight)
    return matrix


def grid(position):
    """Pixel positions on OpenCV's grid of 1/32 pixel."""
    return np.floor((np.rint(position * 1024) + 16) / 32) / 32


def centres(count, outputs):
    """Positions among `count` pixels of the centres of `outputs` pixels."""
    return (np.arange(outputs) + 0.5) * count / outputs - 0.5


def prepare(image, settings):
    """[h, w, 3] uint8 -> [1, 3, S, S] float32, and matrices along y and x that lead back to the image's pixels."""
    size, cubic, sides = settings["size"], settings["interpolation"] == "bicubic", image.shape[:2]
    if settings["resize"] in ("square", "square_aliased"):
        pixels = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        if settings["resize"] == "square_aliased":
            pixels = stretched(image, size, cubic=False)
        back = [np.linspace(0, size - 1, n) for n in sides]
        if settings["interpolation"] == "nearest":
            back = [np.arange(n) * size // n for n in sides]
        return normalised(pixels, settings), [taps(p, size, cubic=cubic, clamp=True) for p in back]
    scale, border = size / max(sides), np.rint(settings["mean"])[:, None, None]
    if settings["resize"] == "longest":
        rows, columns = (int(n * scale + 0.5) for n in sides)
        inner = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
        pixels = np.broadcast_to(border, (3, size, size)).copy()
        pixels[:, :rows, :columns] = inner.transpose(2, 0, 1)
        back = [taps(centres(m, n), m, cubic=False, clamp=True) for n, m in zip(sides, (rows, columns), strict=True)]
        return normalised(pixels, settings), [np.pad(m, ((0, 0), (0, size - m.shape[1]))) for m in back]
    shifts = [(size - scale * n) / 2 for n in sides]
    along = [
        taps(grid((np.arange(size) - shift) / scale), n, cubic=True, clamp=False)
        for n, shift in zip(sides, shifts, strict=True)
    ]
    warped = along[0] @ (image.transpose(2, 0, 1) - border) @ along[1].T + border
    back = [grid(np.arange(n) * scale + shift) for n, shift in zip(sides, shifts, strict=True)]
    return normalised(np.floor(warped + 0.5).clip(0, 255), settings), [
        taps(p, size, cubic=cubic, clamp=not cubic) for p in back
    ]


def stretched(image, size, *, cubic):
    """[h, w, 3] uint8 -> [3, size, size], all of the image without antialiasing."""
    along = [taps(centres(n, size), n, cubic=cubic, clamp=True) for n in image.shape[:2]]
    return np.rint(along[0] @ image.transpose(2, 0, 1) @ along[1].T).clip(0, 255)


def second(image, settings):
    """What a model with another image encoder reads besides, [1, 3, v, v] float32."""
    kind, size = settings["view"]
    clip = {"mean": [122.7709383, 116.7460125, 104.09373615], "std": [68.5005327, 66.6321579, 70.32316305]}
    return normalised(stretched(image, size, cubic=kind == "bicubic"), clip)


def normalised(pixels, settings):
    """[3, S, S] pixels -> [1, 3, S, S] float32."""
    mean, std = (np.array(settings[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return ((pixels.astype(np.float32) - mean) / std)[None]


def tokens(sentence, settings, folder):
    """input_ids [1, L] int64 and text_mask [1, L] bool."""
    from tokenizers import Tokenizer

    ids, length = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(sentence).ids, settings["max_tokens"]
    if len(ids) > length:
        ids = ids[: length - 1] + ids[-1:] if settings["keeps_end_token"] else ids[:length]
    return np.array([ids + [0] * (length - len(ids))], np.int64), np.arange(length)[None] < len(ids)


def probability(logits, back, settings):
    """[K, h, w] float32 -> [H, W] at the image's own size."""
    size, cubic = settings["size"], settings["interpolation"] == "bicubic"
    values = logits[1] - logits[0] if len(logits) == 2 else logits[0]
    if cubic:
        values = 1 / (1 + np.exp(-values))
    cropped = settings["interpolation"] == "cropped"
    to = [
        taps(centres(n, size) if cropped else np.linspace(0, n - 1, size), n, cubic=cubic, clamp=True)
        for n in values.shape
    ]
    values = back[0] @ (to[0] @ values @ to[1].T) @ back[1].T
    return values if cubic else 1 / (1 + np.exp(-values))


def found(logits, no_target, back, settings):
    """[H, W] bool: empty where the model's head, or else the number of pixels, says that there is nothing."""
    mask = probability(logits, back, settings) > settings["threshold"]
    nothing = mask.sum() < settings["no_target_pixels"] if no_target is None else no_target[0].argmax() == 1
    return mask & (not nothing)


def main():
    """Segment one image from the command line."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    import onnxruntime

    folder, (image_file, sentence, mask_file) = Path(__file__).parent, sys.argv[1:]
    settings = json.loads((folder / "export.json").read_text())
    image = np.asarray(ImageOps.exif_transpose(Image.open(image_file)).convert("RGB"))
    pixels, back = prepare(image, settings)
    ids, text_mask = tokens(sentence, settings, folder)
    given = {"image": pixels, "input_ids": ids, "text_mask": text_mask}
    if settings.get("view"):
        given["view"] = second(image, settings)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    values = session.run(names, {entry.name: given[entry.name] for entry in session.get_inputs()})
    output = dict(zip(names, values, strict=True))
    mask = found(output["logits"][0], output.get("no_target"), back, settings)
    Image.fromarray(mask).convert("L").save(mask_file)
    print(f"{100 * mask.mean():.1f} % of the image -> {mask_file}" if mask.any() else f"nothing found -> {mask_file}")


if __name__ == "__main__":
    main()
