"""Rules for per-sample gradients, one file per family of layers.

A rule is a function ``(module, activations, backprops) -> {parameter: [B, *parameter.shape]}``, which is the signature
of Opacus's grad samplers. ``activations[0]`` is the input of the module, and ``backprops`` is the gradient of the
summed loss with respect to its output. Both have the records as first dimension. Nothing here is registered.
"""
