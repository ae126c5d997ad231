"""The provider of a simulated cluster's nodes: Ray's, which lists what is up as a cloud does. Ray's own lists the dead, too."""

from collections.abc import Mapping
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    """Nodes are processes of this machine; one whose daemon has ended is gone."""

    def non_terminated_nodes(self, tag_filters: Mapping[str, Any]) -> list[str]:
        """The ids of those with these tags that are up."""
        with self.lock:
            started = {name: entry["node"] for name, entry in self._nodes.items() if "node" in entry}
            for name in [name for name, node in started.items() if not node.remaining_processes_alive()]:
                self.terminate_node(name)
            listed: list[str] = super().non_terminated_nodes(tag_filters)
            return listed
