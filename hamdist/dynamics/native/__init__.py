"""Code in C, built when hamdist is installed where a C compiler is at hand.

scripts/build_native.py builds it; dynamics/native/rows.py calls it, and says whether it is there.
"""
