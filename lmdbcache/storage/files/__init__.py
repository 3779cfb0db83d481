"""The files of a store and what the machine allows: generations, locks, maps, forks."""
