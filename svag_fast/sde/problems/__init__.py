"""Problems whose gradients, and where possible expectations, are known in closed form."""
