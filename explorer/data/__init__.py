"""The data of the pages, read from stores, runs, samples and models; independent of HTML and HTTP."""
