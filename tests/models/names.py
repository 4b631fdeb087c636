"""Names of networks by family."""

VGGS = [f"vgg{depth}{ending}" for depth in (11, 13, 16, 19) for ending in ("", "_bn")]
CNNS = [*VGGS, "resnet18", "resnet34", "resnet50", "densenet121"]
OTHERS = [
    *("vit_tiny", "vit_s_16", "vit_b_16", "mamba_tiny", "mamba_130m", "mixer_tiny", "mlp", "unet")
]
