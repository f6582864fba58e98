"""Record the features of the default images, for the probe on machines that cannot have the weights.

    python tools/record_features.py

Reads data/ as prepare_data.py makes it, the weights as train_vit_probe.py does, with its cache features/, and writes
vit_features.safetensors (--out), which that script reads: grid6, which begins with class, in 4 bits a value, two values
a byte, with a scale and an offset for each dimension.
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


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=probe.RECORDED, help="file to write")
    out = parser.parse_args().out
    # float32, so that it does not matter whether this processor computes bf16.
    args = probe.make_parser().parse_args(["--features", "grid6", "--mixed-precision", "no"])
    accelerator = common.make_accelerator(args.mixed_precision)
    data = common.load_data(args.data_dir, args.image_size)
    file, identity = probe.choose_backbone(accelerator, args)
    if identity["weights"] != "pretrained":
        raise common.UserError("no weights: name their file in VIT_TINY_WEIGHTS")
    vit = probe.load_vit(file, args.image_size)
    backbone = probe.Backbone(vit, args.features, accelerator.mixed_precision).to(accelerator.device)
    identity["parameters"] = sum(parameter.numel() for parameter in backbone.parameters())
    identity |= {key: list(vit.pretrained_cfg[key]) for key in ("mean", "std")}
    features, _ = probe.extract_all(args, data, backbone, identity, accelerator)
    features = {split: views[0].float() for split, views in features["grid6"].items()}  # the only view
    low, high = torch.quantile(features["train"], torch.tensor([CUT, 1 - CUT]), dim=0)
    scale = ((high - low) / (LEVELS - 1)).clamp(min=1e-6)
    tensors = {"scale": scale, "offset": low}
    for split, values in features.items():
        levels = ((values - low) / scale).round().clamp(0, LEVELS - 1).to(torch.uint8)
        tensors[split] = levels[:, 0::2] << 4 | levels[:, 1::2]
    common.save_tensors(out, tensors, {"backbone": identity, "images": data.description["sha256"]})
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    common.cli(main)
