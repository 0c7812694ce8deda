"""A criterion and a repair. Once this package is installed, every command of notall
knows them by name.
"""

from notall import RepairedPlan, locate

NOTALL_API = 1  # of notall.plugins, which has the types that these functions may use


def lightest(setting):
    """Mean square of the weights: the smallest first."""
    structure = setting.space.structure
    layers = setting.model.get_submodule(structure.layers)
    sizes = {}
    for part in structure.sublayers:
        weights = [
            weight
            for path in part.modules
            for weight in layers[part.index].get_submodule(path).parameters()
        ]
        sizes[part.name] = sum(
            float(weight.detach().float().square().mean()) for weight in weights
        ) / len(weights)
    return {unit: sum(sizes[name] for name in unit) for unit in setting.space.units}


def scaled(model, plan, batches):
    """Output projections of the remaining MLPs, a tenth stronger."""
    paths = [
        f"{locate(model).layers}.{index}.mlp.down_proj.weight"
        for index in range(model.config.num_hidden_layers)
    ]
    kept = [path for index, path in enumerate(paths) if index not in plan.mlp]
    return RepairedPlan.of(
        plan, weights={path: 1.1 * model.get_parameter(path).detach() for path in kept}
    )
