"""Bring the pretend GPUs into every Python process below one that has PRETEND_CUDA set and this folder on PYTHONPATH.

Python imports a module of this name at its start. torch asks for CUDA's hooks once, while it is imported: the library
is loaded just before, and torch.cuda's Python is replaced just after. Processes that import no torch pay nothing.
"""

import os
import sys

if os.environ.get("PRETEND_CUDA"):
    from importlib.machinery import PathFinder

    class Finder:
        """Finds torch once, with a loader that loads the library before and installs the pretend GPUs after."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != "torch":
                return None
            sys.meta_path.remove(Finder)
            sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
            from pretend_cuda import load

            spec = PathFinder.find_spec(name, path, target)
            execute = spec.loader.exec_module

            def exec_module(module):
                library = load.load_library()
                execute(module)
                load.install(library)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder)
