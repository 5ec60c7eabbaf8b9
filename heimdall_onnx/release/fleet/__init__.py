"""Many releases from one plan, on Dask's workers."""
