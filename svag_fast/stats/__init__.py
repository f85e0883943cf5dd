"""Values with standard errors, and means of series that know their own correlation."""
