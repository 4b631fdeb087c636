"""Question 4: which networks and layers its shares are of."""

from experiments.study import main_effect, similarity


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
        "when": dict.fromkeys(similarity.WHEN, layers),
        "test_auc": {"backbone": auc},
        "pointwise": ["shortcut_conv/kernel"],
        "merged": {"conv2/kernel": 3, "shortcut_conv/kernel": 7},
        "selected": {"conv2/kernel": 900, "shortcut_conv/kernel": 100},
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
    text = similarity.came_out(FOUND)
    assert "none at all in 1 of 2 narrow networks, at most 2.000% in the others" in text
    assert "(1 more hardly learned and are not counted); whole 12.500%." in text
    assert "3 of 24 networks and optimizers; 1 are of full width" in similarity.sure(FOUND)


def test_a_row_has_the_layers_apart():
    (table,) = similarity.tables(FOUND)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["deep: backbone"] == "51.00%" and row["deep, larger than 1x1: backbone"] == "2.00%"
    assert row["shallow: backbone"] == "50.00%" and row["highest cosine there"] == "0.02"
    assert row["merged of selected, larger than 1x1; 1x1"] == "3 of 900; 7 of 100"


def test_what_the_most_similar_partner_merges_is_told_by_size():
    text = similarity.came_out(FOUND)
    assert "12 of 3,600 selected kernels larger than 1x1 merged (0.3%), and 28 of 400" in text
    assert "most of the former, 3, in one layer, conv2/kernel of a, " in text
    assert "(99% quantile: 0.02 after backbone, 0.02 after finetune, 0.02 after inmerge)" in text


def test_convolutions_of_1x1_are_told_from_their_shapes():
    assert similarity.pointwise("vgg11") == []
    assert all("shortcut_conv" in name for name in similarity.pointwise("resnet18"))
    bottlenecks = similarity.pointwise("resnet50")
    assert "layer4_2/conv1/kernel" in bottlenecks and "layer4_2/conv3/kernel" in bottlenecks
    assert "layer4_2/conv2/kernel" not in bottlenecks


def test_every_arm_is_drawn():
    plots = similarity.figures(FOUND)
    *maps, last = (plot.label for plot in plots)
    ends = ("before training", "after the backbone", "after finetune", "after inmerge")
    assert all(label.endswith(end) for label, end in zip(maps, ends, strict=True))
    assert last == "Kernel similarity by depth: whole"
    assert plots[-1].caption.endswith("Of 1x1 are convolutions 3.")


def test_networks_of_full_width_are_question_1s():
    whole = [cell for cell in similarity.grid() if cell.backbone.width == 1]
    theirs = {cell.hash for cell in main_effect.grid()}
    assert sum(cell.hash in theirs for cell in whole) == 12 and len(whole) == 15
    assert {cell.backbone.seed for cell in whole} == {0}
