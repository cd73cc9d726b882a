"""This project's engine with every model running all its layers, shared or not: what sharing them gains."""

from __future__ import annotations

from bench.peers.ours import Ours


class Apart(Ours):
    share_layers = False


PEER = Apart
