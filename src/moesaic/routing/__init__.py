"""The ground floor: routers, gates, auxiliary losses and the trace. Needs torch and nothing else."""

from moesaic.routing.entropy import renyi, shannon, tsallis
from moesaic.routing.gates import AsTheyAre, EntropyHybrid, Gate, Routing, Softmax, TopK, TopP
from moesaic.routing.losses import (
    AuxiliaryLoss,
    MutualInformation,
    Record,
    Records,
    Similarity,
    SwitchBalance,
    ZLoss,
    pool,
)
from moesaic.routing.made import Seen
from moesaic.routing.router import (
    Joint,
    LinearRouter,
    Map,
    Router,
    RoutingContext,
    SharingRouter,
    Site,
    by_router,
    float_linear,
    no_autocast,
)
from moesaic.routing.sums import TokenSums
from moesaic.routing.trace import RoutingTrace, paired

__all__ = [
    "AsTheyAre",
    "AuxiliaryLoss",
    "EntropyHybrid",
    "Gate",
    "Joint",
    "LinearRouter",
    "Map",
    "MutualInformation",
    "Record",
    "Records",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingTrace",
    "Seen",
    "SharingRouter",
    "Similarity",
    "Site",
    "Softmax",
    "SwitchBalance",
    "TokenSums",
    "TopK",
    "TopP",
    "ZLoss",
    "by_router",
    "float_linear",
    "no_autocast",
    "paired",
    "pool",
    "renyi",
    "shannon",
    "tsallis",
]
