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


@dataclass(frozen=True)
class PublishedFindings:
    """Published test AUROCs of the 14 findings of ChestX-ray14, and their mean as it was printed.

    Attributes:
      label: whose they are.
      split: which images they were tested on.
      same_as: the split by name that has these very test images; None where no split here has.
      auc: in the order of the data set's classes.
      mean: of them.
      images: how many test images the split `same_as` has.
      names_sha256: `inmerge_jax.data.dataset.names_sha256` of them.
    """

    label: str
    split: str
    same_as: str | None
    auc: tuple[float, ...]
    mean: float
    images: int | None = None
    names_sha256: str = ""


CHESTXRAY14 = (
    PublishedFindings(
        "reproduce-chexnet, DenseNet-121",
        "test images of chexnet",
        "chexnet",
        (
            *(0.8180, 0.9090, 0.8827, 0.7156, 0.8377, 0.7756, 0.7617),
            *(0.8776, 0.8002, 0.8945, 0.9316, 0.8251, 0.7889, 0.9175),
        ),
        0.838,
        images=22_433,
        names_sha256="a20c79828a7825d1d5ac7e8e1b2eccdb21db7e87f9449415f40896116264d55a",
    ),
    PublishedFindings(
        "CheXNet",
        "its authors' own",
        None,
        (
            *(0.8094, 0.9248, 0.8638, 0.7345, 0.8676, 0.7802, 0.7680),
            *(0.8887, 0.7901, 0.8878, 0.9371, 0.8047, 0.8062, 0.9164),
        ),
        0.841,
    ),
    PublishedFindings(
        "Wang 2017, as CheXNet quotes it",
        "its authors' own",
        None,
        (
            *(0.716, 0.807, 0.784, 0.609, 0.706, 0.671, 0.633),
            *(0.806, 0.708, 0.835, 0.815, 0.769, 0.708, 0.767),
        ),
        0.738,
    ),
)


def comparable_findings(dataset: dict) -> tuple[PublishedFindings, ...]:
    """The published rows that were tested on exactly this run's test images, by their names."""
    digest = dataset.get("test_names_sha256")
    return tuple(row for row in CHESTXRAY14 if digest and row.names_sha256 == digest)


def published_reference(dataset: dict, model: dict) -> Published | None:
    """The benchmark's number for this data set and network, or None where there is none.

    Only 28 px, full width and the small stem match the benchmark's networks. Its "224 px" column
    is the 28 px image enlarged, which no run here trains on, so it is not listed. A data set whose
    title has a note, such as one from an unverified file, need not have the benchmark's images.
    """
    if dataset.get("title", dataset["name"]) != dataset["name"]:
        return None
    numbers = MEDMNIST_28.get(dataset["name"], {}).get(model.get("name", ""))
    matches = (
        dataset.get("size") == 28
        and model.get("width", 1.0) == 1.0
        and model.get("stem", "small") == "small"
    )
    if numbers is None or not matches:
        return None
    return Published(f"{model['name']} 28 px, published", *numbers, MEDMNIST_SOURCE)
