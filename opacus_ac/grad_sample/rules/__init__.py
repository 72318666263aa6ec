"""Per-sample gradient rules, one file per layer family.

A rule is a plain function ``(module, activations, backprops) -> {parameter: [B, *parameter.shape]}``, the signature of
Opacus's grad samplers: ``activations[0]`` is the module's input, ``backprops`` the gradient of the summed loss with
respect to its output, records first in both. Nothing here touches a registry.
"""
