"""Train a CIFAR model on this machine's CPU or GPU and export it to ONNX.  Needs the extra: pip install '.[train]'

    python tools/train.py --data DIR                                  # ResNet-20 on CIFAR-10, about 140 s per epoch on 2 cores
    python tools/train.py --data DIR --checkpoint run.pt              # a second run continues where the first one stopped
    python tools/train.py --model resnet50 --dataset cifar100 --epochs 60     # on a GPU, with bfloat16 where it is exact enough

The recipe is fixed before the run: SGD with Nesterov momentum, one learning-rate cycle (linear warm-up over a tenth of the
run, then linear to zero), random crops of the reflect-padded image, and flips that alternate between epochs.  With
--progressive the first epochs see smaller images (SIZES), which saves a third of the time.  The test split is read once,
after the last epoch, in ONNX Runtime, and no choice depends on it.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from cifar import find_or_fetch
from nets import NETS
from torch import Tensor, nn
from torch.nn import functional

from requant_onnx.files.save import save_model
from requant_onnx.inputs.images import CIFAR_MEAN_STD, ImageSet, load_cifar

CLASSES = {"cifar10": 10, "cifar100": 100}
SIZES = ((0.3, 20), (0.6, 24), (1.0, 32))  # --progressive: (end of the phase as a fraction of the run, side of the images)


def normalize(x: np.ndarray, dataset: str) -> Tensor:
    """Normalize (n, 3, 32, 32) uint8 to float32, with zero mean and unit variance over the train split."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in CIFAR_MEAN_STD[dataset])
    return (torch.from_numpy(x).float() / 255.0 - mean) / std


def augment(x: Tensor, epoch: int, order: Tensor, generator: torch.Generator) -> Tensor:
    """Crop a random 32x32 window of the image padded by 4 (reflect); flip each image in every second epoch."""
    padded = functional.pad(x, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, len(x)), generator=generator).to(x.device)
    line = torch.arange(32, device=x.device)
    rows, columns = (top[:, None] + line)[:, None, :, None], (left[:, None] + line)[:, None, None, :]
    image, channel = torch.arange(len(x), device=x.device), torch.arange(3, device=x.device)
    crops = padded[image[:, None, None, None], channel[None, :, None, None], rows, columns]
    flip = ((order * 2654435761 >> 7) + epoch) % 2 == 0  # a fixed half of the images, the other half next epoch
    return torch.where(flip[:, None, None, None], crops.flip(3), crops)


def learning_rate(progress: float, peak: float) -> float:
    """The learning rate of one cycle: 0 -> peak over the first tenth, peak -> 0 over the rest.  progress: 0..1."""
    return peak * min(progress / 0.1, (1.0 - progress) / 0.9)


def image_size(progress: float) -> int:
    """The side of the train images with --progressive, in pixels.  progress: 0..1."""
    return next(size for end, size in SIZES if progress < end)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, epoch: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Make one pass over the images.  Returns the mean loss and the accuracy, both on the augmented train images."""
    generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    steps = len(images) // args.batch_size
    loss_sum, hits, started = 0.0, 0, time.time()
    size = image_size(epoch / args.epochs) if args.progressive else images.shape[-1]
    model.train()
    for step in range(steps):
        chosen = order[step * args.batch_size : (step + 1) * args.batch_size].to(args.device)
        x, y = augment(images[chosen], epoch, chosen, generator), labels[chosen]
        if size < x.shape[-1]:
            x = functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((epoch + step / steps) / args.epochs, args.lr)
        optimizer.zero_grad()
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.mixed_precision):
            logits = model(x)
            loss = functional.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
        loss.backward()
        optimizer.step()
        loss_sum, hits = loss_sum + loss.item(), hits + int((logits.argmax(1) == y).sum())
        if step % 50 == 49:
            rate = (time.time() - started) / (step + 1)
            print(
                f"epoch {epoch + 1}/{args.epochs} step {step + 1}/{steps} loss {loss_sum / (step + 1):.4f} "
                f"{rate * 1000:.0f} ms a step",
                flush=True,
            )
    return loss_sum / steps, hits / (steps * args.batch_size)


def save_atomically(state: dict[str, object], path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def fit(model: nn.Module, data: ImageSet, args: argparse.Namespace) -> None:
    """Train `model` in place; continue from args.checkpoint if it exists, and save it after every epoch."""
    assert data.y is not None
    images, labels = normalize(data.pixels, args.dataset).to(args.device), torch.from_numpy(data.y).to(args.device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    first = 0
    if args.checkpoint.is_file():
        state = torch.load(args.checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    runner = torch.compile(model) if args.compile else model
    for epoch in range(first, args.epochs):
        started = time.time()
        loss, accuracy = train_epoch(runner, optimizer, images, labels, epoch, args)
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}, accuracy on augmented train images {accuracy:.4f}, "
            f"{time.time() - started:.0f} s",
            flush=True,
        )
        save_atomically({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, args.checkpoint)


def export(model: nn.Module, path: Path) -> None:
    """Write the model with a free batch size: input (n, 3, 32, 32) float32, output logits (n, classes)."""
    batch = torch.export.Dim("batch", min=1)
    exported = torch.onnx.export(
        model.cpu().eval(), (torch.zeros(2, 3, 32, 32),), dynamo=True, opset_version=18,
        input_names=["input"], output_names=["logits"], dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    assert exported is not None
    save_model(without_traces(exported.model_proto), path)


def without_traces(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the exporter's notes about source code on this machine (stack traces with paths)."""
    items = [proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    for item in items:
        del item.metadata_props[:]
        item.doc_string = ""
    return proto


def onnx_accuracy(path: Path, data: ImageSet, dataset: str) -> float:
    """The top-1 of the exported file in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    x = normalize(data.pixels, dataset).numpy()
    scores = np.concatenate([session.run(None, {name: x[k : k + 500]})[0] for k in range(0, len(x), 500)])
    return float((scores.argmax(1) == data.y).mean())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(NETS), default="resnet20")
    parser.add_argument("--dataset", choices=sorted(CLASSES), default="cifar10")
    parser.add_argument("--data", type=Path, help="directory of the dataset (default: the cache, or a download)")
    parser.add_argument("--out", type=Path, help="ONNX file to write (default: models/MODEL_DATASET.onnx)")
    parser.add_argument("--checkpoint", type=Path, help="file for the state after each epoch (default: MODEL_DATASET.pt)")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="label smoothing of the targets, 0..1")
    parser.add_argument("--progressive", action="store_true", help="start with smaller images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixed-precision", action=argparse.BooleanOptionalAction, help="train in bfloat16 (default: on a GPU)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler; about 8 %% faster)")
    args = parser.parse_args()
    if args.mixed_precision is None:
        args.mixed_precision = args.device != "cpu"
    args.checkpoint = args.checkpoint or Path(f"{args.model}_{args.dataset}.pt")
    args.out = args.out or Path("models") / f"{args.model}_{args.dataset}.onnx"
    return args


def main() -> None:
    args = parse_arguments()
    folder = find_or_fetch(args.dataset, args.data)
    torch.manual_seed(args.seed)
    model = NETS[args.model](CLASSES[args.dataset]).to(args.device, memory_format=torch.channels_last)
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, on {args.device}")
    fit(model, load_cifar(args.dataset, folder, "train"), args)
    export(model, args.out)
    print(f"{args.out}: top-1 {onnx_accuracy(args.out, load_cifar(args.dataset, folder, 'test'), args.dataset):.2%} on test")


if __name__ == "__main__":
    main()
