"""What only watches a run: records, console, tracker, profiles, spectra."""
