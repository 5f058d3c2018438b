r"""What attacks cost, as ratios to the bare forward and input-gradient passes that they cannot do without.

    python benchmarks/speed/robustness.py --rounds 9 --json benchmarks/results/speed_robustness.json \
        --markdown docs/results/speed_robustness.md
    python benchmarks/speed/robustness.py --rounds 3      # a quick look

ResNet-20 of width 16 on batches of 128, in evaluation mode with frozen weights; PGD with 10 steps, ``linf`` 8/255. The
floor is ten times ``torch.autograd.grad`` of the loss with respect to the images, and nothing else. Contenders run in
turn, in an order that rotates from round to round. Two ratios are printed for each: best wall time over the floor's
best wall time, and median CPU time over its. Peers (torchattacks, foolbox, ART) take part where they are
installed: ``pip install lightning-plugins[bench]``; torchattacks pins an old ``requests``, so install it by itself with
``pip install --no-deps torchattacks``. All attack the net with frozen weights; ART takes and gives NumPy arrays.

With ``--accuracy`` a net is first trained adversarially on the digits, and its robust accuracy under the attack on the
bfloat16 copy is compared with that under the attack on the net itself, both measured on the net itself.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Contender, add_peer, environment, measure, write
from tables import robustness as markdown
from torch import Tensor, nn

from lightning_plugins.models import resnet20
from lightning_plugins.robustness import attack_copy, pgd

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def make_batch(size: int, channels: int, number: int = 128) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(number, channels, size, size, generator=generator)
    return images, torch.randint(10, (number,), generator=generator)


def make_net(channels: int) -> nn.Module:
    """A net whose batch normalisations have seen the data, frozen."""
    torch.manual_seed(0)
    net = resnet20(in_channels=channels)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(64, channels, 32, 32))
    return net.eval().requires_grad_(False)


def passes(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Ten forward passes and input gradients, without a step between them."""
    for _ in range(STEPS):
        inputs = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(inputs), targets, reduction="sum"), inputs)
    return gradient


def plain_loop(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The loop that one would write by hand, with PGD's start."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    lower, upper = (images - EPS).clamp_min(0), (images + EPS).clamp_max(1)
    x = (images + EPS * (2 * noise - 1)).clamp(lower, upper)
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), targets, reduction="sum"), x)
        x = (x.detach() + STEP * gradient.sign()).clamp(lower, upper)
    return x.detach()


def ours(net: nn.Module, images: Tensor, targets: Tensor, **arguments: Any) -> Tensor:
    """Our attack with the same numbers."""
    return pgd(net, images, targets, eps=EPS, step_size=STEP, num_steps=STEPS, **arguments).adversarial


def contenders(channels: int, images: Tensor, targets: Tensor) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the floor first, then all others; and which peers are left out, and why."""
    net = make_net(channels)
    folded = attack_copy(net, example=images[:8])
    unfolded = make_net(channels).to(memory_format=torch.channels_last)
    bfloat16 = attack_copy(net, dtype=torch.bfloat16)
    last = images.contiguous(memory_format=torch.channels_last)
    found: dict[str, Contender] = {
        "ten passes": lambda: passes(net, images, targets),
        "plain loop": lambda: plain_loop(net, images, targets),
        "ours": lambda: ours(net, images, targets),
        "ours, logits of the end not counted": lambda: without_last_pass(net, images, targets),
        "ours, channels last": lambda: ours(unfolded, last, targets),
        "ours, on the copy": lambda: ours(folded, last, targets),
        "ours, on the copy in bfloat16": lambda: ours(bfloat16, last, targets),
    }

    def torchattacks() -> Contender:
        import torchattacks

        attack = torchattacks.PGD(make_net(channels), eps=EPS, alpha=STEP, steps=STEPS, random_start=True)
        return lambda: attack(images, targets)

    def foolbox() -> Contender:
        import foolbox

        model = foolbox.PyTorchModel(make_net(channels), bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=True)
        return lambda: attack(model, images, targets, epsilons=EPS)

    def art() -> Contender:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        model = PyTorchClassifier(
            make_net(channels),
            nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=10,
            clip_values=(0, 1),
            device_type="cpu",
        )
        attack = ProjectedGradientDescentPyTorch(
            model, eps=EPS, eps_step=STEP, max_iter=STEPS, num_random_init=1, batch_size=len(images), verbose=False
        )
        arrays = images.numpy(), targets.numpy()
        return lambda: attack.generate(*arrays)

    left_out = add_peer(found, "torchattacks", ["torchattacks"], torchattacks)
    left_out |= add_peer(found, "foolbox", ["foolbox", "eagerpy"], foolbox)
    left_out |= add_peer(found, "ART", ["art"], art)
    return found, left_out


def without_last_pass(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Run our attack on a function that answers the one pass without gradients at no cost."""
    blank = torch.zeros(len(images), 10)
    return ours(lambda x: net(x) if x.requires_grad else blank, images, targets)  # type: ignore[arg-type]


def robust_accuracies(epochs: int) -> dict[str, float]:
    """Train a net on the digits with PGD and attack it through itself and through its copies."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images, targets = F.interpolate(images, size=16), torch.tensor(targets)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:900], order[900:]
    torch.manual_seed(0)
    net = resnet20(in_channels=1, width=8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * 9)
    eps, step = 0.15, 0.05
    for _ in range(epochs):
        for rows in train[torch.randperm(900)].split(100):
            attacked = pgd(net, images[rows], targets[rows], eps=eps, step_size=step, num_steps=5).adversarial
            optimizer.zero_grad()
            F.cross_entropy(net(attacked), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    accuracies = {"clean": float((net(images[test]).argmax(1) == targets[test]).double().mean())}
    copies = {"net": net, "copy": attack_copy(net), "copy in bfloat16": attack_copy(net, dtype=torch.bfloat16)}
    for name, target in copies.items():
        found = pgd(target, images[test], targets[test], eps=eps, step_size=eps / 4, num_steps=10).adversarial
        with torch.no_grad():
            accuracies[name] = float((net(found).argmax(1) == targets[test]).double().mean())
    return accuracies


def main() -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", type=int, default=0, metavar="EPOCHS", help="also train and attack a small net")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    images, targets = make_batch(options.size, options.channels, options.batch)
    found, left_out = contenders(options.channels, images, targets)
    if not torch.equal(found["ours"](), found["plain loop"]()):
        raise SystemExit("our attack differs from the plain loop")
    rows = measure(found, options.rounds)
    shape = f"{options.batch} x {options.channels} x {options.size} x {options.size}"
    print(f"PGD-{STEPS}, ResNet-20, {shape}, {options.threads} threads, {options.rounds} rounds")
    print(f"{'':40}{'wall':>9}{'wall ms':>10}{'CPU':>9}")
    for name, row in rows.items():
        print(f"{name:40}{row['wall_ratio']:9.3f}{row['wall_ms']:10.0f}{row['cpu_ratio']:9.3f}")
    accuracies = robust_accuracies(options.accuracy) if options.accuracy else {}
    for name, value in accuracies.items():
        print(f"robust accuracy, attack through {name}: {value:.2%}")
    report = {
        "environment": environment("torchattacks", "foolbox", "adversarial-robustness-toolbox"),
        "batch": shape,
        "rounds": options.rounds,
        "rows": rows,
        "accuracies": accuracies,
        "left_out": left_out,
    }
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
