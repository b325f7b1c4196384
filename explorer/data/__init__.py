"""What the pages show, read out of stores, runs, samples and models; nothing here knows of HTML or HTTP."""
