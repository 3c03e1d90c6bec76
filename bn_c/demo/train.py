"""Train the demo's network and write ``digits.npz`` and ``network.npz`` beside this file.

Run ``python -m bn_c.demo.train``; it needs ``pip install 'bn_c[train]'``. Seeds, thread count and
algorithms are fixed, so that with the same versions of PyTorch and scikit-learn on the same kind
of CPU it writes the same arrays again.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SEED = 0
TEST_IMAGES = 360
EPOCHS = 30
BATCH = 64


def _require(module: str) -> Any:
    """Import an optional dependency, or exit with one line that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed; run: pip install 'bn_c[train]'")


def _build(torch: Any) -> Any:
    nn = torch.nn
    layers = {
        "conv1": nn.Conv2d(1, 16, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(16),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, 3, padding=1, bias=False),
        "bn2": nn.BatchNorm2d(32),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": nn.Conv2d(32, 32, 3, padding=1, bias=False),
        "bn3": nn.BatchNorm2d(32),
        "relu3": nn.ReLU(),
        "pool3": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(128, 10),
    }
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network


def _fit(torch: Any, network: Any, images: Any, labels: Any) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    network.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    """Train on 1437 digits, print the accuracy on the other 360, and write both files."""
    torch = _require("torch")
    digits = _require("sklearn.datasets").load_digits()
    split = _require("sklearn.model_selection").train_test_split

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    train_images, test_images, train_labels, test_labels = split(
        digits.images.astype(np.uint8),
        digits.target.astype(np.uint8),
        test_size=TEST_IMAGES,
        stratify=digits.target,
        random_state=SEED,
    )

    def as_input(images: Any) -> Any:
        return torch.from_numpy(images[:, None].astype(np.float32) / 16)

    network = _build(torch)
    _fit(torch, network, as_input(train_images), torch.from_numpy(train_labels).long())
    network.eval()
    with torch.no_grad():
        predicted = network(as_input(test_images)).argmax(1).numpy()
    print(f"test accuracy with running statistics: {np.mean(predicted == test_labels):.1%}")

    # The convolutions' and the linear layer's weights in half the space: the demo's batch norms are what it shows.
    state = {name: (value.half() if value.ndim > 1 else value).numpy() for name, value in network.state_dict().items()}
    np.savez_compressed(FOLDER / "digits.npz", images=test_images, labels=test_labels)
    np.savez_compressed(FOLDER / "network.npz", **state)


if __name__ == "__main__":
    main()
