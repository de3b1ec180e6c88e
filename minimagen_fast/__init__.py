"""minimagen_fast: the performance edition of the ``minimagen`` package.

The documented modules keep their names, classes and arguments: ``minimagen_fast.Unet`` is a *module*, and
``from minimagen_fast.Unet import Unet`` gives the class. No class is re-exported here, since one named like a
module would shadow it. Importing the package imports nothing heavy and queries no device.
"""

__version__ = "0.1.0"
