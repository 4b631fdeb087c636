"""Question 4: which networks and layers its shares are of."""

from experiments import medmnist, redundancy


def layer(name, share, kernels=10):
    return {"name": name, "kernels": kernels, "above": {"0.3": share}, "maximum": share} | {
        "quantiles": dict.fromkeys(("0.05", "0.5", "0.95", "0.99"), share)
    }


def network(auc, share, width=0.25, optimizer="adam"):
    layers = [layer("conv1/kernel", 0.5), layer("conv2/kernel", share)]
    layers.append(layer("shortcut_conv/kernel", 1.0))
    return {
        "model": "resnet18",
        "optimizer": optimizer,
        "width": width,
        "epochs": 8,
        "data": "breastmnist",
        "when": dict.fromkeys(redundancy.WHEN, layers),
        "test_auc": {"backbone": auc},
        "merged": {"conv2/kernel": 3, "shortcut_conv/kernel": 7},
        "selected": 1000,
        "skip": 1,
    }


FOUND = {
    "networks": {
        "a": network(0.9, 0.02),
        "b": network(0.8, 0.0),
        "untrained": network(0.4, 0.25),
        "whole": network(0.9, 0.125, width=1.0),
    }
}


def test_shares_are_of_networks_that_learned_and_of_no_shortcuts():
    text = redundancy.came_out(FOUND)
    assert "0.00% to 2.00% of the pairs of deep kernels" in text and "median of 2 networks" in text
    assert "none at all in 1" in text and "1 more networks hardly learned" in text
    assert "whole 12.500% before training, 12.500% after the backbone" in text
    assert "3 of 24 networks and optimizers; 1 are of full width" in redundancy.sure(FOUND)


def test_a_row_has_the_layers_apart():
    (table,) = redundancy.tables(FOUND)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["deep: backbone"] == "51.00%" and row["deep without shortcuts: backbone"] == "2.00%"
    assert row["shallow: backbone"] == "50.00%" and row["highest cosine there"] == "0.02"
    assert row["merged of selected; in shortcuts"] == "10 of 1,000; 7"


def test_every_arm_is_drawn():
    first, second, *others = (plot.label for plot in redundancy.figures(FOUND))
    assert first.endswith("after the backbone") and second.endswith("after inmerge")
    assert others == ["Kernel similarity by depth: whole"]


def test_networks_of_full_width_are_question_1s():
    whole = [cell for cell in redundancy.grid() if cell.backbone.width == 1]
    theirs = {cell.hash for cell in medmnist.grid()}
    assert sum(cell.hash in theirs for cell in whole) == 12 and len(whole) == 15
    assert {cell.backbone.seed for cell in whole} == {0}
