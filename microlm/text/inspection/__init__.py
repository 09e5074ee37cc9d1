"""Looking at data that is there: audit from the files, gates, licences, single records."""
