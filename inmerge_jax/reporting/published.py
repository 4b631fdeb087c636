"""Published numbers that a table can stand beside; data only, and never mixed with a run's own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published result: test AUC and ACC, and where they were printed."""

    label: str
    auc: float
    acc: float
    source: str


MEDMNIST_SOURCE = (
    "MedMNIST v2 benchmark (Yang et al. 2023, table on medmnist.com): Adam 1e-3, batch 128, "
    "100 epochs, best validation AUC"
)

# Test (AUC, ACC) at 28 px: subset -> model -> numbers, as the benchmark's table prints them.
MEDMNIST_28: dict[str, dict[str, tuple[float, float]]] = {
    "pathmnist": {"resnet18": (0.983, 0.907), "resnet50": (0.990, 0.911)},
    "chestmnist": {"resnet18": (0.768, 0.947), "resnet50": (0.769, 0.947)},
    "dermamnist": {"resnet18": (0.917, 0.735), "resnet50": (0.913, 0.735)},
    "octmnist": {"resnet18": (0.943, 0.743), "resnet50": (0.952, 0.762)},
    "pneumoniamnist": {"resnet18": (0.944, 0.854), "resnet50": (0.948, 0.854)},
    "retinamnist": {"resnet18": (0.717, 0.524), "resnet50": (0.726, 0.528)},
    "breastmnist": {"resnet18": (0.901, 0.863), "resnet50": (0.857, 0.812)},
    "bloodmnist": {"resnet18": (0.998, 0.958), "resnet50": (0.997, 0.956)},
    "tissuemnist": {"resnet18": (0.930, 0.676), "resnet50": (0.931, 0.680)},
    "organamnist": {"resnet18": (0.997, 0.935), "resnet50": (0.997, 0.935)},
    "organcmnist": {"resnet18": (0.992, 0.900), "resnet50": (0.992, 0.905)},
    "organsmnist": {"resnet18": (0.972, 0.782), "resnet50": (0.972, 0.770)},
}


def published_reference(dataset: dict, model: dict) -> Published | None:
    """The benchmark's number for this data set and network, or None where there is none.

    Only 28 px, full width and the small stem match the benchmark's networks. Its "224 px" column
    is the 28 px image enlarged, which no run here trains on, so it is not listed.
    """
    numbers = MEDMNIST_28.get(dataset["name"], {}).get(model.get("name", ""))
    matches = (
        dataset.get("size") == 28
        and model.get("width", 1.0) == 1.0
        and model.get("stem", "small") == "small"
    )
    if numbers is None or not matches:
        return None
    return Published(f"{model['name']} 28 px, published", *numbers, MEDMNIST_SOURCE)
