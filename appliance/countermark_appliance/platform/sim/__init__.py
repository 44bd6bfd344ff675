"""The simulated platform: production's wire formats under a development root, for demos and tests.

Everything it makes says SIMULATED in a name a person reads, and no production policy accepts its roots. `create` makes
a machine and publishes the measurements of the code installed now; `boot` measures the code installed then.
"""

from countermark_appliance.platform.sim.machine import SimPlatform, TdLaunch, boot
from countermark_appliance.platform.sim.measure import image_id, publish
from countermark_appliance.platform.sim.state import State, create, load

__all__ = ["SimPlatform", "State", "TdLaunch", "boot", "create", "image_id", "load", "publish"]
