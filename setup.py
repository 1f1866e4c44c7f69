"""The compiled CPU kernels: built where there is a C compiler, left out where there is none."""

from setuptools import Extension, setup

FLAGS = ["-O3", "-g0", "-std=gnu11", "-fwrapv", "-fopenmp-simd", "-Wall", "-Wextra"]
FLAGS += ["-Wno-pass-failed"]  # clang's, of each short loop that it leaves as it is
# Sums may be taken in any order, so that loops of sums are vectorised; NaN and infinity stay, the sign of a zero may not.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
FOLDER = "syncbn/kernels"
SOURCES = [f"{FOLDER}/{name}.c" for name in ("cpu", "cpu_128", "cpu_256", "cpu_512")]
HEADERS = [f"{FOLDER}/{name}.h" for name in ("cpu", "cpu_half", "cpu_loops")]

setup(ext_modules=[Extension("syncbn.kernels._cpu", SOURCES, depends=HEADERS, extra_compile_args=FLAGS, optional=True)])
