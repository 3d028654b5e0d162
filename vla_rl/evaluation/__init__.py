"""Success from fixed initial states: playing, results that can be continued and compared, tables, videos."""
