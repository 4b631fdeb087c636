"""Published results, for comparison with a run's own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published result: test AUC and ACC, and their source."""

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
    """Published test AUROCs of the 14 findings of ChestX-ray14.

    Attributes:
      label: authors and network.
      split: description of the test images.
      values: AUROCs in the order of the data set's classes, and their mean as printed.
      same_as: name of the split with the same test images; None if there is none.
      images: number of test images of that split.
      names_sha256: `inmerge_jax.data.dataset.names_sha256` of its test images.
    """

    label: str
    split: str
    values: tuple[float, ...]
    same_as: str | None = None
    images: int | None = None
    names_sha256: str = ""


# fmt: off
CHESTXRAY14 = (
    PublishedFindings(
        "reproduce-chexnet, DenseNet-121",
        "test images of chexnet",
        (.8180, .9090, .8827, .7156, .8377, .7756, .7617, .8776, .8002, .8945, .9316, .8251, .7889,
         .9175, .838),
        same_as="chexnet",
        images=22_433,
        names_sha256="a20c79828a7825d1d5ac7e8e1b2eccdb21db7e87f9449415f40896116264d55a",
    ),
    PublishedFindings(
        "CheXNet",
        "its authors' own",
        (.8094, .9248, .8638, .7345, .8676, .7802, .7680, .8887, .7901, .8878, .9371, .8047, .8062,
         .9164, .841),
    ),
    PublishedFindings(
        "Wang 2017, as CheXNet quotes it",
        "its authors' own",
        (.716, .807, .784, .609, .706, .671, .633, .806, .708, .835, .815, .769, .708, .767, .738),
    ),
)
# fmt: on


def comparable_findings(dataset: dict) -> tuple[PublishedFindings, ...]:
    """Published rows with the same test images as this run, compared by file names."""
    digest = dataset.get("test_names_sha256")
    return tuple(row for row in CHESTXRAY14 if digest and row.names_sha256 == digest)


def published_reference(dataset: dict, model: dict) -> Published | None:
    """The benchmark's result for this data set and network; None if there is none.

    Only networks of full width with the small stem, at 28 px, match the benchmark's. Its "224 px"
    column is the enlarged 28 px image and is not listed. A data set whose title has a note, such as
    one from an unverified file, may have other images than the benchmark.
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
