"""Record the default features of the default images, for the probe on machines that cannot have the weights.

    python tools/record_features.py

Reads the default data and the pretrained weights as train_vit_probe.py does, with its cache features/, and writes
vit_features.safetensors (--out), which that script reads: 4 bits a value, two values a byte, with a scale and an
offset for each dimension. The same features give the same bytes.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import train_vit_probe as probe  # noqa: E402

LEVELS = 16
# Share of the training images' values cut off at each end: with less the steps are coarser, with more the ends are
# far off. Of 0 to 2%, and of 2 to 4 standard deviations instead, this has the least squared error on validation.
CUT = 0.005


def choose_steps(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Size of a step and value of level 0, float32 [D] each, for features [N, D] of the training images."""
    ends = torch.tensor([CUT, 1 - CUT])
    low, high = torch.quantile(features.float(), ends, dim=0)
    scale = (high - low) / (LEVELS - 1)
    return scale.clamp(min=1e-6), low


def pack(features: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Features [N, D] as uint8 [N, D / 2]: the nearest level of each, the first of a pair in the high four bits."""
    steps = (features.float() - offset) / scale
    levels = steps.round().clamp(0, LEVELS - 1).to(torch.uint8)
    return levels[:, 0::2] << 4 | levels[:, 1::2]


def main() -> None:
    parser = common.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=probe.RECORDED, help="file to write")
    out = parser.parse_args().out
    # float32, so that it does not matter whether this processor computes bf16.
    args = probe.make_parser().parse_args(["--mixed-precision", "no"])
    accelerator = common.make_accelerator(args.mixed_precision)
    kind, file = probe.choose_backbone(accelerator, args)
    if kind != "pretrained":
        raise common.UserError("no weights: name their file in VIT_TINY_WEIGHTS")
    common.prepare_default_data(accelerator, args.data_dir)
    data = common.load_data(args.data_dir, args.image_size)
    parts = probe.all_parts(args.features)
    backbone, identity = probe.open_backbone(kind, file, parts, args.image_size, accelerator)
    features, _ = probe.extract_all(args, data, backbone, identity, accelerator)
    features["train"] = features["train"][0]  # the only view

    scale, offset = choose_steps(features["train"])
    tensors = {"scale": scale, "offset": offset}
    meta = {"backbone": identity, "parts": parts, "images": {}}
    for name, split in data.splits.items():
        tensors[name] = pack(features[name], scale, offset)
        meta["images"][name] = split.sha256
    common.save_tensors(out, tensors, meta)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    common.cli(main)
