"""A repair under way in a folder, which an interrupted run goes on from."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..plan import Plan
from ..results.ledger import Ledger
from ..results.provenance import Provenance
from ..results.repairs import RefitRecord
from ..running import repair_folder
from ..running.repair_folder import refit_file
from ..running.repaired import RepairedPlan


class Kept:
    """What was refit so far, and the weights, a file a step. Refuses other work."""

    def __init__(self, folder: Path, plan: Plan, about: Provenance) -> None:
        self.folder = folder
        self.refits = Ledger(folder, RefitRecord, about)
        self.finished = (
            repair_folder.refuse_other_work(folder, RefitRecord, plan)
            and (folder / repair_folder.PLAN).is_file()
        )

    def add(
        self, refit: RefitRecord, brought: RepairedPlan, model: PreTrainedModel
    ) -> None:
        """Keep a step and the weights that it `brought`, where it brought any."""
        if (
            brought.weights or brought.prompt_weights
        ):  # first: a line says that they are there
            digest = repair_folder.write_weights(
                self.folder / refit_file(refit), brought.knowing(model)
            )
            refit = refit.model_copy(update={"sha256": digest})
        self.refits.add(refit)

    def prompt_weights(self, refit: RefitRecord) -> dict[str, Tensor]:
        """The weights of the prompt's own that a kept step brought."""
        if refit.ridge is None:
            return {}
        file = refit_file(refit)
        return repair_folder.read_weights(
            self.folder, file, refit.sha256
        ).prompt_weights

    def sealed(self, plan: Plan) -> RepairedPlan:
        """The finished plan, read back from the folder."""
        files = {
            refit_file(one): one.sha256 for one in self.refits if one.ridge is not None
        }
        repair_folder.seal(self.folder, plan, files)
        return RepairedPlan.load(self.folder)
