"""Where simulated trainings are done: in this process, in several, or on a Ray cluster.

The same seed gives the same bits in each of them.
"""

from simulations.workshop.cohorts import CohortRule
from simulations.workshop.in_process import InProcess
from simulations.workshop.job import Job, Trainer, Workshop
from simulations.workshop.processes import Processes
from simulations.workshop.ray_cluster import RayWorkshop
from simulations.workshop.remembered import Remembered

__all__ = [
    "CohortRule",
    "InProcess",
    "Job",
    "Processes",
    "RayWorkshop",
    "Remembered",
    "Trainer",
    "Workshop",
]
