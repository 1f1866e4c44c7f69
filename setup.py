"""The compiled CPU kernels: built where there is a C compiler, left out where there is none."""

from setuptools import Extension, setup

FLAGS = ["-O3", "-g0", "-std=gnu11", "-fwrapv", "-fopenmp-simd", "-Wall", "-Wextra"]
# Sums may be taken in any order, so that loops of sums are vectorised; NaN and infinity stay, the sign of a zero may not.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]

setup(ext_modules=[Extension("syncbn.kernels._cpu", ["syncbn/kernels/cpu.c"], extra_compile_args=FLAGS, optional=True)])
