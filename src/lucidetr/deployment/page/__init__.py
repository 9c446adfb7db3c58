"""The page of the service, on which one can watch the detector think."""
