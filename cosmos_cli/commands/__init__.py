"""One module per verb: options in, one call into the package, a result out."""
