# Included by CMake at the start of llama-cpp-python's project (see tools/llama_build.py).
# llama.cpp's helpers for its own command-line programs are 57 of 193 build steps; Python uses none of them.
set(LLAMA_BUILD_COMMON OFF)
