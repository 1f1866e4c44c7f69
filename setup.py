"""The compiled CPU kernels: built where there is a C compiler, left out where there is none."""

from setuptools import Extension, setup

FLAGS = ["-O3", "-g0", "-std=gnu11", "-fwrapv", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Wextra"]

setup(ext_modules=[Extension("syncbn.kernels._cpu", ["syncbn/kernels/cpu.c"], extra_compile_args=FLAGS, optional=True)])
