from onediff.cli import main

main()
